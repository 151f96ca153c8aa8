// What the parts of the block emulator share: the fibres that stand for a block's threads (machine.cpp).
#pragma once

#include <cstddef>
#include <string>

#include "emulate.h"

namespace mimo::emulated {

constexpr int kLanes = 32;
constexpr size_t kSharedAlignment = 1024;
constexpr size_t kMostShared = 227 << 10;  // of a block, where it asks for more than 48 KiB

// Those that wait for each other: the lanes of a warp at a shuffle, or the threads of a block at a barrier.
struct Meeting {
    int arrived = 0;
    unsigned round = 0;
    Place place{"", 0};
};

bool meet(Meeting& meeting, int all, Place place);  // true for the last of `all`, who does not wait
void wait();                                        // the other fibres' turn
void progress();                                    // this round was not in vain
void fail(const std::string& message);              // ends the launch; does not return to a fibre
int current_thread();
int thread_count();
bool ended(int thread);
char* shared_begin();

}  // namespace mimo::emulated
