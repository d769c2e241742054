"""The zoo: every stage of graphreg on the models of other people, and the table of what came of it."""
