"""Data, networks, filter groups, their evaluation and surgery, and the Gymnasium environments.

Import from the modules; importing the package itself stays light.
"""
