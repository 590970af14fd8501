"""The runner: a self-contained program that loads one artifact and answers batches on a socket.

It is run as a directory by the Python of the model's own environment, so every module here imports the
standard library, NumPy and the model's libraries only, in syntax that Python 3.9 understands.
"""
