"Tests compute on the CPU, also where there is a GPU; those that name another device get it"
import os
import signal

os.environ['SAGAN_DEVICE'] = 'cpu'
# As in a terminal, also where the tests run in the background, whose processes ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)
