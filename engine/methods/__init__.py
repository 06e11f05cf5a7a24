"""One file is one method. `registry.available()` imports every file here; methods never import each other."""
