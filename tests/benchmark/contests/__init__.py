"""What is compared with what: a file for each kind of work, whose `contests` makes it ready."""
