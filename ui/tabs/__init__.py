"""One file a tab. A tab is a function that draws itself and returns its elements; `layout.py` lists them."""
