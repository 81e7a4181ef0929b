"""One page about runs, as a single HTML file."""
