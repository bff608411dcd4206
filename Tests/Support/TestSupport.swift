internal import QCOW2
