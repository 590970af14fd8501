"""The validator: is an artifact intact and safe, and does it load and answer?"""
