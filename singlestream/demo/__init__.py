"""`singlestream demo`: one run from nothing to a report, through the same services as any run."""
