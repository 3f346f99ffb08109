"Tests compute on the CPU, also where there is a GPU; those that name another device get it"
import os

os.environ['SAGAN_DEVICE'] = 'cpu'
