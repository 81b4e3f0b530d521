"""The study: recipes, their results and what is made of them.

It is the only package to import every other.
"""
