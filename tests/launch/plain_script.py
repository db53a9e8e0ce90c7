"""The same without a package around it, as most scripts are."""

from tests.launch.script import main

if __name__ == "__main__":
    main()
