// Everything a translated kernel needs, and nothing of the standard library but fixed-width
// integers.
#pragma once
#include "arithmetic.h"
#include "atomics.h"
#include "copies.h"
#include "counters.h"
#include "matrix.h"
#include "memory.h"
#include "print.h"
#include "warp.h"
