"""``medr1 report``: a run as one HTML page that needs no network.

* ``collect``  what the page shows, read from a run folder, its data and its audit logs
* ``sections`` the fixed part of the page: figures, tables, curves
* ``cli``      puts both, and the browser of answers (``browser.js``, ``page.css``), into one file
"""
