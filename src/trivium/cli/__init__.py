"""The command line: arguments in, calls out, a file per group of commands."""
