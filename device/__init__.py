"""The student without torch: export.py makes a folder, shrink.py makes the student small, run.py and
student.js answer, web.py serves the folder as a page."""
