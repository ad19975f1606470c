"""The student without torch: export.py makes a folder, shrink.py makes it small, run.py and student.js answer,
web.py serves it as a page."""
