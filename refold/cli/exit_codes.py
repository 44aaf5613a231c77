"""What the command line ends with."""

OK, ERROR, USAGE, NUMBERS, EXPECTATION, INTERRUPTED = 0, 1, 2, 3, 4, 130
