// Frame tables of lists of frames: the masks of FrameMask's constructors (see frame_mask.h).
#include "frame_mask.h"

#include "bindings.h"

namespace {

using namespace mimo::frame_mask;

// Where the frames of a clip begin, and its end. `starts` is used again for every clip.
void find_starts(int64_t row, const Lens& lens, size_t clip, std::vector<int64_t>& starts) {
    starts.assign(1, row);
    for (size_t t = 0; t < lens.count(clip); ++t) starts.push_back(row += lens.clip(clip)[t]);
}

// How far back a frame sees: so many frames, itself included, so many tokens, its own included; and the first frames of
// the clip. No window: kMaxTokens.
struct Reach {
    int64_t frames, tokens, sink;

    Reach(int64_t frames, int64_t tokens, int64_t sink)
        : frames(frames > 0 ? frames : kMaxTokens), tokens(tokens > 0 ? tokens : kMaxTokens), sink(sink) {
        if (sink < 0) fail("sink is " + std::to_string(sink) + "; expected a number of frames >= 0");
    }
};

struct Past {
    Interval sinks, latest;
};

// Of the first `visible` frames of a clip: its sinks and the last `frames` of them, as far as `tokens` tokens go.
Past past(const std::vector<int64_t>& starts, int64_t visible, int64_t frames, int64_t tokens, int64_t sink) {
    const int64_t first = std::max(starts[std::max<int64_t>(0, visible - frames)], starts[visible] - tokens);
    return {{starts[0], std::min(first, starts[std::min(sink, visible)])}, {first, starts[visible]}};
}

// A frame of one copy, which is among those it sees, whole.
Past past_with(const std::vector<int64_t>& starts, int64_t t, const Reach& reach) {
    return past(starts, t + 1, reach.frames, std::max(reach.tokens, starts[t + 1] - starts[t]), reach.sink);
}

// A future frame of `own` tokens: it counts as one of those it sees, and stands elsewhere.
Past past_before(const std::vector<int64_t>& starts, int64_t t, int64_t own, const Reach& reach) {
    return past(starts, t, reach.frames - 1, std::max<int64_t>(0, reach.tokens - own), reach.sink);
}

// future_first: in every clip the future frames come before the history frames. Returns Table::result.
py::tuple teacher_forcing(py::handle history, py::handle future, py::handle drop, int64_t window, int64_t sink,
                          int64_t window_tokens, bool future_first) {
    int64_t total = 0;
    const Lens history_lens = read_lens(history, "history_lens", total);
    const Lens future_lens = read_lens(future, "future_lens", total);
    const size_t clips = history_lens.clips();
    if (clips != future_lens.clips()) {
        fail("history_lens has " + std::to_string(clips) + " clips and future_lens has " +
             std::to_string(future_lens.clips()) + "; expected the same number");
    }
    Drops dropped;
    if (!drop.is_none()) {
        dropped = read_drops(drop, "drop_history");
        if (dropped.clips() != clips) {
            fail("drop_history has " + std::to_string(dropped.clips()) + " clips and future_lens has " +
                 std::to_string(clips) + "; expected bool [clips, frames]");
        }
    }
    const Reach reach(window, window_tokens, sink);

    Table table(history_lens.values.size() + future_lens.values.size());
    std::vector<int64_t> history_starts, future_starts;
    const Lens &first_lens = future_first ? future_lens : history_lens,
               &last_lens = future_first ? history_lens : future_lens;
    std::vector<int64_t>&first_starts = future_first ? future_starts : history_starts,
    &last_starts = future_first ? history_starts : future_starts;
    last_starts.assign(1, 0);
    for (size_t c = 0; c < clips; ++c) {
        const int64_t frames = history_lens.count(c), first_row = last_starts.back();
        const auto differs = [&](const char* name, size_t count) {
            fail(at("history_lens", c) + " has " + std::to_string(frames) + " frames and " + at(name, c) + " has " +
                 std::to_string(count) + "; expected the same number");
        };
        if (future_lens.count(c) != history_lens.count(c)) differs("future_lens", future_lens.count(c));
        if (dropped.clips() && dropped.count(c) != history_lens.count(c)) differs("drop_history", dropped.count(c));
        find_starts(first_row, first_lens, c, first_starts);
        find_starts(first_starts.back(), last_lens, c, last_starts);
        table.begin_clip(last_starts.back() - first_row);
        const auto add_history = [&] {
            for (int64_t t = 0; t < frames; ++t) {
                const auto [sinks, latest] = past_with(history_starts, t, reach);
                table.add(history_lens.clip(c)[t], {sinks, latest});
            }
        };
        const auto add_future = [&] {
            for (int64_t t = 0; t < frames; ++t) {
                const Interval own{future_starts[t], future_starts[t + 1]};
                const auto [sinks, latest] = past_before(history_starts, t, own.size(), reach);
                if (dropped.clips() && dropped.clip(c)[t])
                    table.add(own.size(), {own});
                else if (future_first)
                    table.add(own.size(), {own, sinks, latest});
                else
                    table.add(own.size(), {sinks, latest, own});
            }
        };
        if (future_first) add_future();
        add_history();
        if (!future_first) add_future();
    }
    return table.result(history_lens, &future_lens);
}

// Every frame sees itself and earlier frames of its clip. queries: None, or the slice of every clip's frames that ask.
py::tuple block_causal(py::handle frame_lens, int64_t window, int64_t sink, int64_t window_tokens, py::handle queries) {
    int64_t total = 0;
    const Lens lens = read_lens(frame_lens, "frame_lens", total);
    const Reach reach(window, window_tokens, sink);
    Py_ssize_t first = 0, last = PY_SSIZE_T_MAX, step = 1;
    if (!queries.is_none()) {
        if (!PySlice_Check(queries.ptr())) fail("queries is " + text(queries) + "; expected a slice of frames");
        const bool read = PySlice_Unpack(queries.ptr(), &first, &last, &step) == 0;
        PyErr_Clear();
        if (!read || step != 1)
            fail("queries is " + text(queries) + "; expected a slice from int to int, without a step");
    }

    Table table(lens.values.size());
    std::vector<int64_t> starts{0};
    for (size_t c = 0; c < lens.clips(); ++c) {
        find_starts(starts.back(), lens, c, starts);
        table.begin_clip(starts.back() - starts[0]);
        Py_ssize_t begin = first, end = last;
        PySlice_AdjustIndices(lens.count(c), &begin, &end, step);
        for (Py_ssize_t t = begin; t < end; ++t) {
            const auto [sinks, latest] = past_with(starts, t, reach);
            table.add(lens.clip(c)[t], {sinks, latest});
        }
    }
    return table.result(lens);
}

// Every frame sees its whole clip: then the clip is a single group of rows.
py::tuple bidirectional(py::handle frames) {
    int64_t total = 0;
    const Lens lens = read_lens(frames, "lens", total);
    Table table(lens.clips());
    std::vector<int64_t> starts{0};
    for (size_t c = 0; c < lens.clips(); ++c) {
        find_starts(starts.back(), lens, c, starts);
        const Interval clip{starts[0], starts.back()};
        table.begin_clip(clip.size());
        table.add(clip.size(), {clip});
    }
    return table.result(lens);
}

void bind(py::module_& m) {
    m.def("frame_table_from_table", &from_cells);
    m.def("frame_table_from_slices", &from_slices);
    m.def("frame_table_teacher_forcing", &teacher_forcing);
    m.def("frame_table_block_causal", &block_causal);
    m.def("frame_table_bidirectional", &bidirectional);
}

const mimo::Binding binding(bind);

}  // namespace
