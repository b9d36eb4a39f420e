"""An interpreter that starts with this on its path has no installed packages."""

import sys

if __name__ == "sitecustomize":
    sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry]
