"""The one way from a record to a verdict.

samples.py   one critique of one record, and its file
cache.py     critiques on disk, which are not drawn again
"""
