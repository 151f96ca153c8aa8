// The block emulator from outside: what a test can set and ask.
#pragma once

#include <string>

#include "shadow.h"

namespace mimo::emulated {

extern Shadow shadow;
void set_order(int seed);      // of the fibres; 0: ascending, 1: descending, else shuffled
const std::string& failure();  // of the last launch, "" for none

}  // namespace mimo::emulated
