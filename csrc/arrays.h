// Lists of plain items for the planner: what it does per frame has to cost nanoseconds.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <utility>

namespace mimo {

constexpr int kRadixBits = 11;

// A list of plain items: nothing is set to zero, and nothing but `extend` and `append` looks whether `room` is enough.
template <typename Item>
class Array {
public:
    explicit Array(size_t room) : items_(new Item[room]), room_(room) {}

    void push(const Item& item) { items_[size_++] = item; }
    // Items at the end for the caller to write.
    Item* extend(size_t more) {
        if (size_ + more > room_) grow(size_ + more);
        size_ += more;
        return items_.get() + size_ - more;
    }
    void append(std::initializer_list<Item> items) { std::copy(items.begin(), items.end(), extend(items.size())); }

    void insert(size_t at, const Item& item) {
        for (size_t i = size_++; i > at; --i) items_[i] = items_[i - 1];
        items_[at] = item;
    }
    void erase(size_t at) {
        for (--size_; at < size_; ++at) items_[at] = items_[at + 1];
    }
    void resize(size_t size) { size_ = size; }  // what is new holds anything
    void swap(Array& other) { items_.swap(other.items_), std::swap(size_, other.size_), std::swap(room_, other.room_); }
    bool empty() const { return size_ == 0; }
    size_t size() const { return size_; }
    Item& operator[](size_t i) { return items_[i]; }
    const Item& operator[](size_t i) const { return items_[i]; }
    Item& back() { return items_[size_ - 1]; }
    const Item* begin() const { return items_.get(); }
    const Item* end() const { return items_.get() + size_; }

private:
    void grow(size_t least) {
        room_ = std::max(least, 2 * room_);
        std::unique_ptr<Item[]> items(new Item[room_]);
        std::copy(begin(), end(), items.get());
        items_.swap(items);
    }

    std::unique_ptr<Item[]> items_;
    size_t room_, size_ = 0;
};

// Stable, ascending; linear in the items for keys of few bits. `spare` has room for as many as `items`.
template <typename Item, typename Key>
void radix_sort(Array<Item>& items, Array<Item>& spare, Key key) {
    uint64_t all = 0;
    for (const Item& item : items) all |= key(item);
    int bits = 0, widest = 4;
    while (bits < 64 && all >> bits) ++bits;
    while (widest < kRadixBits && size_t{1} << widest < items.size()) ++widest;
    const int passes = (bits + widest - 1) / widest;
    if (passes == 0) return;
    const int width = (bits + passes - 1) / passes;
    const uint64_t digits = (uint64_t{1} << width) - 1;
    spare.resize(items.size());
    for (int shift = 0; shift < bits; shift += width) {
        std::array<uint32_t, (1 << kRadixBits) + 1> place;
        std::fill(place.begin(), place.begin() + digits + 2, 0);
        for (const Item& item : items) ++place[(key(item) >> shift & digits) + 1];
        for (uint64_t digit = 0; digit < digits; ++digit) place[digit + 1] += place[digit];
        for (const Item& item : items) spare[place[key(item) >> shift & digits]++] = item;
        items.swap(spare);
    }
}

}  // namespace mimo
