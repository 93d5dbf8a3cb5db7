"""One HTML page that answers what the records of a folder can answer: python -m harness.report"""
