"""The study: recipes, their results and what is made of them. The only package to import every other."""
