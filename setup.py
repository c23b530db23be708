"""What setup.cfg cannot say: the README as PyPI shows it.

There it stands alone, so pictures and links into the repository would lead nowhere.
"""

import re
from pathlib import Path

from setuptools import setup

TEXT = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
TEXT = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n+", "", TEXT)
TEXT = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", TEXT)

setup(long_description=TEXT, long_description_content_type="text/markdown")
