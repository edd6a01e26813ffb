"""Jobs: files of requests become files of answers, and whatever stops a job costs little.

answer_file.py  the job as a whole
requests.py     a source of data as requests: what each is called, how it is laid out for the model
ahead.py        requests are made ready before they are asked, in processes that may die
asking.py       requests become answers: sorted within windows, in the order of the file again
output.py       the file of answers: what an earlier run left, what is added or replaced
rows.py         its rows: which requests they answer
header.py       the file beside it, which says what made the answers
parts.py        several hosts: which requests each has, and one file of what they wrote
progress.py     what is said of a job while it runs
"""
