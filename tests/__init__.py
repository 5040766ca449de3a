"""Tests of tessera, laid out as its packages are."""

#: This variable of the environment names the folder in which the processes of one run of pytest keep what they compose.
COMPOSED = "TESSERA_TESTS_COMPOSED"
