"""The paper's table in miniature: a study that one command runs, continues and reports."""
