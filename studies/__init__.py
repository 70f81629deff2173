"""What `study.py` stands on: a question, the record of its runs, the answer."""
