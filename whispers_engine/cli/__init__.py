"""The `whispers` command. Results go to stdout, progress and errors to stderr."""
