"""Section III-D of the survey: other ways to run the same weights."""
