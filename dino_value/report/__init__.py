"""Reports: what results allow one to say, the pictures, the HTML page and the terminal's table.

``figures`` and ``page`` import matplotlib; ``statistics`` and ``terminal`` stay light.
"""
