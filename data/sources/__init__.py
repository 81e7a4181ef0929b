"""Making data: converters, downloads, generated scenes."""
