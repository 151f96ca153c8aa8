#include "async.h"

#include <algorithm>
#include <set>

#include "async_state.h"

namespace mimo::emulated::async {

State state;

namespace {

Agent products_of(int group) { return static_cast<Agent>(state.threads + group); }

std::string who(Agent agent) {
    if (agent < state.threads) return "thread " + std::to_string(agent);
    if (agent < state.threads + kWarpgroups) return "a product of warpgroup " + std::to_string(agent - state.threads);
    for (const auto& [address, barrier] : state.barriers) {
        if (barrier.copies == agent) return "a copy counted by barrier '" + barrier.name + "'";
    }
    return "a copy";
}

std::string outside(uint32_t address, size_t bytes) {
    return "an access outside of the shared memory: " + std::to_string(bytes) + " bytes at " + at(address) + " (of " +
           std::to_string(state.shared_bytes) + ")";
}

// "" or what is wrong with `agent` reading, who knows what `knows` does.
std::string read_words(uint32_t address, size_t bytes, Moment reader, const Knowledge& knows, bool by_hardware) {
    if (address + bytes > state.shared_bytes) return outside(address, bytes);
    for (uint32_t i = address / 4; i < (address + bytes + 3) / 4; i++) {
        Word& word = state.words[i];
        if (word.barrier) return "a read of a barrier, " + at(i * 4);
        const Moment writer = word.writer;
        if (writer.agent == kNobody) return "a read of " + at(i * 4) + ", which nobody has written";
        if (knows.seen[writer.agent] < writer.time && writer.agent != reader.agent)
            return "a data race: a read of " + at(i * 4) + ", which " + who(writer.agent) + " wrote and nothing orders";
        if (by_hardware && writer.agent < state.threads && knows.fenced[writer.agent] < writer.time)
            return "no fence_async: a copy or product reads " + at(i * 4) + ", which " + who(writer.agent) + " stored";
        bool known = false;
        for (Moment& other : word.readers) {
            if (other.agent == reader.agent) other.time = reader.time, known = true;
        }
        if (!known) word.readers.push_back(reader);
    }
    return "";
}

std::string write_words(uint32_t address, size_t bytes, Moment by, Agent issuer, bool by_hardware) {
    if (address + bytes > state.shared_bytes) return outside(address, bytes);
    const Knowledge& knows = state.thread[issuer].knows;
    for (uint32_t i = address / 4; i < (address + bytes + 3) / 4; i++) {
        Word& word = state.words[i];
        if (word.barrier) return "a write to a barrier, " + at(i * 4);
        const Moment writer = word.writer;
        // Two copies of one phase that overlap have no order either.
        if (writer.agent != kNobody && writer.agent != issuer && knows.seen[writer.agent] < writer.time)
            return "a data race: a write of " + at(i * 4) + ", which " + who(writer.agent) +
                   " wrote and nothing orders";
        if (by_hardware && writer.agent != kNobody && writer.agent < state.threads &&
            knows.fenced[writer.agent] < writer.time)
            return "no fence_async: a copy overwrites " + at(i * 4) + ", which " + who(writer.agent) + " stored";
        for (const Moment& reader : word.readers) {
            if (reader.agent != issuer && knows.seen[reader.agent] < reader.time)
                return "a data race: a write of " + at(i * 4) + ", which " + who(reader.agent) +
                       " reads and nothing orders";
        }
        word.writer = by;
        word.readers.clear();
    }
    return "";
}

// ---- barriers ----

void end_phase_if_full(Barrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.gathering.seen[barrier.copies] = barrier.issued;
    barrier.released.learn(barrier.gathering);
    barrier.pending = barrier.arrivals;
    barrier.phase++;
    progress();
}

// ---- copies ----

void finish(const Copy& copy) {
    for (const auto& [address, bytes] : copy.pieces) std::memcpy(shared_begin() + address, bytes.data(), bytes.size());
    Barrier& barrier = state.barriers.at(copy.barrier);
    barrier.bytes -= copy.bytes;
    progress();
    end_phase_if_full(barrier);
}

void finish_copy(size_t i) {
    const Copy copy = state.copies[i];
    state.copies.erase(state.copies.begin() + i);
    finish(copy);
}

bool now() { return state.mode == kEarly || (state.mode == kByChance && state.chance() % 2); }

// ---- products ----

float widen16(uint16_t bits, bool half) { return half ? from_half(bits) : __uint_as_float(uint32_t{bits} << 16); }

struct Descriptor {
    uint32_t address, tile_bytes, group_bytes;
    int width;
};

Descriptor decode(uint64_t bits) {
    const auto swizzle = bits >> 62;
    require((bits >> 49 & 7) == 0, "a tile descriptor with a base offset");
    require(swizzle == 1 || swizzle == 3, "a tile descriptor with a swizzle that is neither 128 nor 32 bytes");
    return {static_cast<uint32_t>(bits & 0x3fff) << 4, static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4,
            static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4, swizzle == 1 ? 128 : 32};
}

// The address of value (row, k) of a tile [rows, 16] that a product reads; transposed: its rows are neighbours in
// memory.
uint32_t value_at(const Descriptor& tile, bool transposed, int row, int k) {
    uint32_t offset;
    if (transposed) {
        const int per_tile = tile.width / 2;
        offset = row / per_tile * tile.tile_bytes + row % per_tile * 2 + k / 8 * tile.group_bytes + k % 8 * tile.width;
    } else {
        offset = row / 8 * tile.group_bytes + row % 8 * tile.width + k * 2;
    }
    return swizzle(tile.address + offset, tile.width);
}

std::vector<float> load_tile(uint64_t bits, bool transposed, int rows, bool half) {
    const Descriptor tile = decode(bits);
    std::vector<float> values(rows * 16);
    for (int row = 0; row < rows; row++) {
        for (int k = 0; k < 16; k++) {
            uint16_t value;
            std::memcpy(&value, shared_begin() + value_at(tile, transposed, row, k), 2);
            values[row * 16 + k] = widen16(value, half);
        }
    }
    return values;
}

void check_tile(uint64_t bits, bool transposed, int rows, Moment moment, int first_thread) {
    const Descriptor tile = decode(bits);
    std::set<uint32_t> pieces;
    for (int row = 0; row < rows; row += transposed ? 8 : 1) {
        for (int k = 0; k < 16; k += transposed ? 1 : 8) pieces.insert(value_at(tile, transposed, row, k));
    }
    // All threads of the warpgroup have to know of what the product reads.
    Knowledge common = state.thread[first_thread].knows;
    for (int i = 1; i < sm90::kWarpgroup; i++) {
        const Knowledge& other = state.thread[first_thread + i].knows;
        for (size_t j = 0; j < common.seen.size(); j++) {
            common.seen[j] = std::min(common.seen[j], other.seen[j]);
            common.fenced[j] = std::min(common.fenced[j], other.fenced[j]);
        }
    }
    for (uint32_t piece : pieces) require_none(read_words(piece, 16, moment, common, true));
}

void compute(Warpgroup& group, Product& product) {
    if (product.done) return;
    product.done = true;
    const int n = product.columns;
    std::vector<float>& sums = group.sums.at(product.x[0]);
    const std::vector<float> b = load_tile(product.tile, product.transposed, n, product.half);
    std::vector<float> a(64 * 16);
    if (product.a[0] == nullptr) {
        a = load_tile(product.a_tile, false, 64, product.half);
    } else {
        for (int t = 0; t < sm90::kWarpgroup; t++) {
            for (int i = 0; i < 8; i++) {  // register i / 2, half i % 2
                const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, k = t % 4 * 2 + i / 4 * 8 + i % 2;
                const uint32_t bits = product.a[t][i / 2] >> i % 2 * 16 & 0xffff;
                a[row * 16 + k] = widen16(static_cast<uint16_t>(bits), product.half);
            }
        }
    }
    std::vector<float> columns(16 * n);
    for (int c = 0; c < n; c++) {
        for (int k = 0; k < 16; k++) columns[k * n + c] = b[c * 16 + k];
    }
    for (int row = 0; row < 64; row++) {
        float* const sum = &sums[row * n];
        if (!product.add) std::fill_n(sum, n, 0.f);
        for (int k = 0; k < 16; k++) {
            const float factor = a[row * 16 + k];
            const float* const column = &columns[k * n];
            for (int c = 0; c < n; c++) sum[c] += factor * column[c];
        }
    }
}

// Which place of the sums [64, n] register i of thread t holds.
int place_of(int t, int i, int n) {
    const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
    return row * n + column;
}

void compute_some(Warpgroup& group) {
    for (Product& product : group.products) compute(group, product);
}

}  // namespace

std::string at(uint32_t address) { return "the shared memory + " + std::to_string(address) + " bytes"; }

void require(bool condition, const std::string& message) {
    if (!condition) fail(message);
}

void require_none(const std::string& wrong) {
    if (!wrong.empty()) fail(wrong);
}

Barrier& barrier_at(uint32_t address) {
    const auto found = state.barriers.find(address);
    require(found != state.barriers.end(), "no barrier was made at " + at(address));
    Barrier& barrier = found->second;
    require(barrier.maker == me() || mine().seen[barrier.maker] >= barrier.made,
            "barrier '" + barrier.name + "' is used by a thread that nothing tells of its making");
    return barrier;
}

void arrive(Barrier& barrier) {
    require(barrier.pending > 0, "more arrivals at barrier '" + barrier.name + "' than it counts in a phase (" +
                                     std::to_string(barrier.arrivals) + ")");
    barrier.gathering.learn(mine());
    release();
    barrier.pending--;
    progress();
    end_phase_if_full(barrier);
}

void issue(Copy copy) {
    Barrier& barrier = barrier_at(copy.barrier);
    require(barrier.fenced, "barrier '" + barrier.name + "' counts a copy and was made without fence_barrier_init");
    const Moment moment{barrier.copies, ++barrier.issued};
    for (const auto& [address, bytes] : copy.pieces)
        require_none(write_words(address, bytes.size(), moment, static_cast<Agent>(me()), true));
    state.copies.push_back(std::move(copy));
    if (now()) finish_copy(state.copies.size() - 1);
}

std::string read_operand(const char* from, size_t bytes) {
    const std::string wrong = shadow.access(reinterpret_cast<uintptr_t>(from), bytes, false, me());
    if (!wrong.empty()) fail(wrong);
    return std::string(from, bytes);
}

uint32_t swizzle(uint32_t address, int width) { return address ^ ((address >> 7 & (width / 16 - 1)) << 4); }

void set_asynchrony(int mode, int seed) {
    state.mode = mode;
    state.chance.seed(seed);
}

void begin_launch(int threads, size_t shared_bytes) {
    state.threads = threads;
    state.shared_bytes = shared_bytes;
    state.agents = threads + kWarpgroups + kBarriers;
    if (threads % sm90::kWarpgroup) fail("a block that is not made of whole warpgroups");
}

void begin_block() {
    std::memset(shared_begin(), 0xff, state.shared_bytes);
    state.words.assign(state.shared_bytes / 4 + 1, Word{});
    state.thread.assign(state.threads, Thread{});
    for (int t = 0; t < state.threads; t++) {
        state.thread[t].knows.clear(state.agents);
        state.thread[t].knows.seen[t] = 1;
    }
    state.barriers.clear();
    for (NamedBarrier& barrier : state.named) {
        barrier = NamedBarrier{};
        barrier.gathering.clear(state.agents);
    }
    const int registers = std::min(255, sm90::kRegisters / state.threads) / 8 * 8;
    for (Warpgroup& group : state.group) {
        group = Warpgroup{};
        group.registers = registers;
    }
    state.free_registers = sm90::kRegisters - registers * state.threads;
    state.warps.assign(state.threads / kLanes, Meeting{});
    state.copies.clear();
    state.offers.assign(state.threads, State::Offer{});
}

void end_block() {
    if (!state.copies.empty())
        fail("a copy counted by barrier '" + state.barriers.at(state.copies[0].barrier).name +
             "' is under way at the end of the block");
    for (int g = 0; g < state.threads / sm90::kWarpgroup; g++) {
        if (!state.group[g].products.empty())
            fail("a product of warpgroup " + std::to_string(g) + " is under way at the end of the block");
    }
}

void between_rounds(bool stuck) {
    if (state.copies.empty()) {
        if (!stuck) return;
        std::set<std::string> names;
        for (int t = 0; t < state.threads; t++) {
            if (!ended(t) && !state.thread[t].waits_for.empty()) names.insert(state.thread[t].waits_for);
        }
        std::string all;
        for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
        fail("threads wait forever for " + (all.empty() ? "a barrier or a shuffle that the others never reach" : all));
        return;
    }
    if (stuck)
        finish_copy(state.mode == kByChance ? state.chance() % state.copies.size() : state.copies.size() - 1);
    else if (state.mode == kByChance && state.chance() % 4 == 0)
        finish_copy(state.chance() % state.copies.size());
}

void join(int first, int count) {
    Knowledge all;
    all.clear(state.agents);
    for (int t = first; t < first + count; t++) all.learn(state.thread[t].knows);
    for (int t = first; t < first + count; t++) {
        Knowledge& knows = state.thread[t].knows;
        knows = all;
        knows.seen[t]++;
    }
}

std::string touch_shared(uint32_t address, size_t bytes, bool write) {
    const Moment moment{static_cast<Agent>(me()), mine().seen[me()]};
    return write ? write_words(address, bytes, moment, static_cast<Agent>(me()), false)
                 : read_words(address, bytes, moment, mine(), false);
}

void touch_registers(uintptr_t address, size_t bytes, bool write) {
    for (const Range& range : state.thread[me()].registers) {
        if (address >= range.end || address + bytes <= range.begin) continue;
        if (write) fail("registers of a product under way are written before its wait");
        if (!range.readable) fail("sums of a product under way are read before its wait");
    }
}

void issue_product(float* x, int columns, const uint32_t* a, uint64_t a_tile, uint64_t tile, bool transposed, bool half,
                   bool add, Place place) {
    const int g = me() / sm90::kWarpgroup, first = g * sm90::kWarpgroup;
    Warpgroup& group = state.group[g];
    state.offers[me()] = {x, a, a_tile, tile, columns, transposed, half, add};
    state.thread[me()].waits_for = "the other threads of a warpgroup at a product";
    if (meet(group.meeting, sm90::kWarpgroup, place)) {
        require(group.fenced, "a product without product_fence since the last group");
        Product product{{}, {}, a_tile, tile, columns, transposed, half, add};
        for (int t = first; t < first + sm90::kWarpgroup; t++) {
            const State::Offer& offer = state.offers[t];
            require(offer.tile == tile && offer.a_tile == a_tile && offer.columns == columns && offer.add == add,
                    "the threads of a warpgroup disagree about a product");
            product.x.push_back(offer.x);
            product.a.push_back(offer.a);
        }
        const Moment moment{products_of(g), ++group.time};
        check_tile(tile, transposed, columns, moment, first);
        if (a == nullptr) check_tile(a_tile, false, 64, moment, first);
        const auto [sums, begins] = group.sums.try_emplace(product.x[0]);
        if (begins) {
            sums->second.resize(64 * columns);
            for (int t = 0; t < sm90::kWarpgroup; t++) {
                for (int i = 0; i < columns / 2; i++) {
                    sums->second[place_of(t, i, columns)] = product.x[t][i];
                    std::memcpy(&product.x[t][i], &kPoison, 4);
                }
            }
        }
        const int number = static_cast<int>(group.time);
        for (int t = 0; t < sm90::kWarpgroup; t++) {
            std::vector<Range>& ranges = state.thread[first + t].registers;
            const auto from = reinterpret_cast<uintptr_t>(product.x[t]);
            ranges.push_back({from, from + columns * 2, false, number});
            const auto fragment = reinterpret_cast<uintptr_t>(product.a[t]);
            if (fragment) ranges.push_back({fragment, fragment + 16, true, number});
        }
        group.products.push_back(std::move(product));
        if (now()) compute_some(group);
    }
    state.thread[me()].waits_for.clear();
}

void wait_for_products(int groups, Place place) {
    const int g = me() / sm90::kWarpgroup, first = g * sm90::kWarpgroup;
    Warpgroup& group = state.group[g];
    state.thread[me()].waits_for = "the other threads of a warpgroup at product_wait";
    if (meet(group.meeting, sm90::kWarpgroup, place)) {
        const int until = group.committed - groups;  // groups before this one are over
        size_t over = 0;
        while (over < group.products.size() && group.products[over].group >= 0 && group.products[over].group < until)
            compute(group, group.products[over++]);
        const uint32_t newest = group.time - static_cast<uint32_t>(group.products.size() - over);
        for (size_t i = 0; i < over; i++) {
            const Product& product = group.products[i];
            const auto same = [&](const Product& other) { return other.x[0] == product.x[0]; };
            if (std::any_of(group.products.begin() + i + 1, group.products.end(), same)) continue;
            const std::vector<float>& sums = group.sums.at(product.x[0]);
            for (int t = 0; t < sm90::kWarpgroup; t++) {
                for (int r = 0; r < product.columns / 2; r++) product.x[t][r] = sums[place_of(t, r, product.columns)];
            }
            group.sums.erase(product.x[0]);
        }
        group.products.erase(group.products.begin(), group.products.begin() + over);
        for (int t = first; t < first + sm90::kWarpgroup; t++) {
            Thread& thread = state.thread[t];
            const auto is_over = [&](const Range& range) { return static_cast<uint32_t>(range.product) <= newest; };
            thread.registers.erase(std::remove_if(thread.registers.begin(), thread.registers.end(), is_over),
                                   thread.registers.end());
            thread.knows.seen[products_of(g)] = newest;
        }
    }
    state.thread[me()].waits_for.clear();
}

// A warpgroup that wants more waits until others have given enough back.
void change_registers(int count, bool grow, Place place) {
    Warpgroup& group = my_group();
    require(count % 8 == 0 && count >= 24 && count <= 256,
            "setmaxnreg of " + std::to_string(count) + "; expected a multiple of 8 from 24 to 256");
    require(grow ? count >= group.registers : count <= group.registers,
            "setmaxnreg to " + std::to_string(count) + " from " + std::to_string(group.registers) + " registers");
    if (meet(group.meeting, sm90::kWarpgroup, place)) group.changing = count;
    state.thread[me()].waits_for = "registers (" + std::to_string(count) + " per thread)";
    while (group.changing) {
        const int more = (group.changing - group.registers) * sm90::kWarpgroup;
        if (more <= state.free_registers) {
            state.free_registers -= more;
            group.registers = group.changing;
            group.changing = 0;
            progress();
        } else {
            wait();
        }
    }
    state.thread[me()].waits_for.clear();
}

}  // namespace mimo::emulated::async
