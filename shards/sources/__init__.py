"""One file or folder per data set."""
