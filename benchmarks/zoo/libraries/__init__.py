"""The zoo of other libraries: one small model of each kind that a library has."""
