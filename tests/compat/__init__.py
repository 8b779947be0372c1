"""A tuned model in the hands of the real libraries: whatever works on a model works on a tuned one, or is refused.

References are computed on an untouched copy, made before anything is attached.
"""
