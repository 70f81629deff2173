"""The parts of `study.py`: a question, the record of its runs, the answer."""
