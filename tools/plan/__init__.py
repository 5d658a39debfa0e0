"""`make plan`: what training on some photos takes, before they exist."""
