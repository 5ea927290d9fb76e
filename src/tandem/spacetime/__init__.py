"""The space-time map: a row per worker, time to the right. The data model, and the module that draws it (map.js).

The console feeds it live, the simulator with a whole run; both give the same rows and spans. Pure.
"""
