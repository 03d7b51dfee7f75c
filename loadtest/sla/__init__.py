"""Does choosing a level per request keep more promises than any one level does?

One trace, one machine, one memory budget; systems that differ in who chooses the level only.
`study` says what is compared, `systems` how each is started and asked, `play` runs one of them
once, `judge` says what it was worth, `show` makes tables and plots.
"""
