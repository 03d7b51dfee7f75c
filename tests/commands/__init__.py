"""Tests of the command line that build nothing."""
