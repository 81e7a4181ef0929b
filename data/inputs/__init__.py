"""Files of images and videos: reading and writing them."""
