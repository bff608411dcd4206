// The door to libdeflate: its header as it is.
#pragma once
#include <libdeflate.h>
