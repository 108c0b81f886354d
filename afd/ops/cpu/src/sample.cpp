#include "sample.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "sample_cut.h"

namespace afd {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

struct Scratch {
    std::vector<float> highest, adjusted;
    std::vector<int32_t> counts, seen;  // counts: of every token; zeros between two rows
    CutScratch cut;
};

// Natural logarithm of x, positive and normal, by operations in a fixed order.
double logarithm(double x) {
    constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
    int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const int64_t power = (bits - kSqrtHalf) >> 52;  // x / 2^power is at least sqrt(1/2), and less than twice that
    bits -= power * (int64_t{1} << 52);
    double f;
    std::memcpy(&f, &bits, sizeof f);
    const double s = (f - 1.0) / (f + 1.0), z = s * s;
    double sum = 1.0 / 17.0;  // of atanh's series
    for (const double term : {1.0 / 15.0, 1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0})
        sum = sum * z + term;
    return static_cast<double>(power) * 0x1.62e42fefa39efp-1 + 2.0 * s * sum;
}

double exponential(double uniform) { return -logarithm(1.0 - uniform); }

int32_t first_of(const LogitRow& row, float value) {
    int32_t group = 0;
    while (row.highest[group] != value) ++group;
    int32_t id = group * kGroup;
    while (row.x[id] != value) ++id;
    return id;
}

// The random numbers of one draw: an exponential variate for every token.
class Dice {
  public:
    Dice(const SampleTable& kernels, const AfdSampleRow& row) : kernels_(kernels), row_(row) {}

    // Of kLanesOfGroup groups.
    class Groups {
      public:
        // Of the number whose exponential, divided by kGroup, is the smallest of the group.
        double uniform(int i) const {
            const int64_t bits = static_cast<int64_t>(words_[0][i]) << 20 | words_[1][i] >> 12;
            return (static_cast<double>(bits) + 0.5) * 0x1p-52;
        }
        // At most uniform / kGroup, but for a rounding.
        float about_least(int i) const { return static_cast<float>(static_cast<int32_t>(words_[0][i] >> 1)) * 0x1p-37f; }
        // The token that has it.
        int32_t lane(int i) const { return static_cast<int32_t>(words_[2][i] >> 26); }

      private:
        friend Dice;
        uint32_t words_[4][kLanesOfGroup];
    };
    Groups of_groups(const int32_t* groups) const {
        uint32_t first[kLanesOfGroup];
        std::copy_n(groups, kLanesOfGroup, first);
        Groups found;
        random(first, 0, found.words_);
        return found;
    }

    // What the exponentials of a group's other tokens exceed the smallest one by: by the uniform numbers' exponentials.
    void of_tokens(int32_t group, double (&uniform)[kGroup]) const {
        uint32_t first[kLanesOfGroup], words[4][kLanesOfGroup];
        for (int i = 0; i < kLanesOfGroup; ++i) first[i] = static_cast<uint32_t>(group * kLanesOfGroup + i);
        random(first, 1, words);
        for (int i = 0; i < kGroup; ++i)
            uniform[i] = (static_cast<double>(words[i / kLanesOfGroup][i % kLanesOfGroup]) + 0.5) * 0x1p-32;
    }

  private:
    void random(const uint32_t* first, uint32_t purpose, uint32_t (*words)[kLanesOfGroup]) const {
        const uint32_t counter[3] = {static_cast<uint32_t>(row_.position), static_cast<uint32_t>(row_.choice), purpose};
        kernels_.random(first, counter, row_.seed, words);
    }

    const SampleTable& kernels_;
    const AfdSampleRow& row_;
};

// The race: of the tokens that are left, that with the least exponential / weight wins.
class Race {
  public:
    Race(const LogitRow& row, const AfdSampleRow& params, const Cut& cut) : row_(row), params_(params), cut_(cut) {}

    int32_t winner(CutScratch& scratch) {
        const int32_t num_groups = row_.num_groups();
        std::vector<int32_t>& groups = scratch.ids;
        groups.resize(num_groups);
        size_t count = 0, first = 0;
        for (int32_t group = 0; group < num_groups; ++group) {
            groups[count] = group;
            first = row_.highest[group] == row_.largest ? count : first;
            count += row_.highest[group] >= cut_.x;
        }
        std::swap(groups[0], groups[first]);  // the sooner a good one is known, the fewer others are looked at
        const size_t room = (count + kLanesOfGroup - 1) / kLanesOfGroup * kLanesOfGroup;
        float* const values = scratch.values.of(room);
        float* const weights = scratch.weights.of(room);
        for (size_t i = 0; i < count; ++i) values[i] = row_.highest[groups[i]];
        std::fill(values + count, values + room, -std::numeric_limits<float>::infinity());
        row_.kernels.weigh(values, static_cast<int32_t>(room), row_.largest, params_.scale, weights);
        groups.resize(room);
        const Dice dice(row_.kernels, params_);
        for (size_t begin = 0; begin < room; begin += kLanesOfGroup) {
            const Dice::Groups found = dice.of_groups(&groups[begin]);
            const float limit = static_cast<float>(best_) * (1 + 0x1p-15f);
            uint32_t open = 0;  // as may_win says, or more
            for (int i = 0; i < kLanesOfGroup; ++i)
                open |= static_cast<uint32_t>(found.about_least(i) <= limit * weights[begin + i]) << i;
            for (; open != 0; open &= open - 1) {
                const int i = __builtin_ctz(open);
                if (may_win(found.uniform(i) / kGroup, weights[begin + i]))
                    run_group(dice, groups[begin + i], exponential(found.uniform(i)) / kGroup, found.lane(i));
            }
        }
        return winner_;
    }

  private:
    // False only if no token of that weight with an exponential of at least `least` can win, roundings included.
    bool may_win(double least, float weight) const { return weight > 0 && least <= best_ * weight * (1 + 0x1p-16); }

    void run_group(const Dice& dice, int32_t group, double smallest, int32_t lane) {
        const int32_t begin = group * kGroup, count = std::min(kGroup, row_.width - begin);
        float weights[kGroup];
        double uniform[kGroup];
        row_.kernels.weigh(row_.x + begin, count, row_.largest, params_.scale, weights);
        dice.of_tokens(group, uniform);
        for (int32_t i = 0; i < count; ++i) {
            const bool has_smallest = i == lane;
            if (!may_win(has_smallest ? smallest : smallest + uniform[i], weights[i])) continue;
            const int32_t id = begin + i;
            if (!cut_.keeps(row_.x[id], id) || mass_of(weights[i]) < params_.least) continue;
            const double time = (has_smallest ? smallest : smallest + exponential(uniform[i])) / weights[i];
            if (time < best_ || (time == best_ && id < winner_)) {
                best_ = time;
                winner_ = id;
            }
        }
    }

    const LogitRow& row_;
    const AfdSampleRow& params_;
    const Cut& cut_;
    double best_ = std::numeric_limits<double>::infinity();
    int32_t winner_ = -1;
};

bool adjusts(const AfdSampleRow& row) {
    return row.num_biases > 0 || row.num_masked > 0 || row.num_prompt > 0 || row.num_output > 0;
}

// Counts tokens in scratch.counts, and lists in scratch.seen those that are new there.
void count_tokens(const int32_t* ids, int32_t num, Scratch& scratch) {
    for (int32_t i = 0; i < num; ++i)
        if (scratch.counts[ids[i]]++ == 0) scratch.seen.push_back(ids[i]);
}

void forget_counts(Scratch& scratch) {
    for (const int32_t id : scratch.seen) scratch.counts[id] = 0;
    scratch.seen.clear();
}

// In the order of docs/sampling.md.
void adjust(const AfdSampleRow& row, float* x, int32_t width, Scratch& scratch) {
    scratch.counts.resize(width);
    for (int32_t i = 0; i < row.num_biases; ++i) x[row.bias_ids[i]] += row.biases[i];
    if (row.repetition != 1.0f) {
        count_tokens(row.prompt, row.num_prompt, scratch);
        count_tokens(row.output, row.num_output, scratch);
        for (const int32_t id : scratch.seen) x[id] = x[id] > 0 ? x[id] / row.repetition : x[id] * row.repetition;
        forget_counts(scratch);
    }
    count_tokens(row.output, row.num_output, scratch);
    for (const int32_t id : scratch.seen)
        x[id] -= static_cast<float>(row.frequency * scratch.counts[id] + row.presence);
    forget_counts(scratch);
    for (int32_t i = 0; i < row.num_masked; ++i) x[row.masked[i]] = -std::numeric_limits<float>::infinity();
}

// Where the results of one row go.
struct RowResult {
    int64_t* token;
    double* logprobs;  // [1 + row.num_logprobs], the token's first
    int32_t* top_ids;  // [row.num_logprobs]
};

// log(sum of e^x), of the logits as the model gave them; and the most likely tokens. x: of a token -> its log-probability.
double normaliser_of(const LogitRow& row, int num_threads) {
    constexpr float kNone = std::numeric_limits<float>::infinity();
    const MassArgs args{row.x, row.highest, row.width, row.largest, kLog2E, 0, kNone, kNone, nullptr, row.after};
    const MassSums sums = sum_masses(row.kernels, args, num_threads);
    return row.largest + logarithm(static_cast<double>(sums.total) / kOneMass);
}

void write_top(const LogitRow& row, int32_t num_top, double normaliser, CutScratch& scratch, const RowResult& out) {
    const int32_t count = std::min(num_top, row.width);
    if (count <= 0) return;
    find_first(row, count, scratch);
    std::partial_sort(scratch.ids.begin(), scratch.ids.begin() + count, scratch.ids.end(), [&](int32_t a, int32_t b) {
        return row.x[a] != row.x[b] ? row.x[a] > row.x[b] : a < b;
    });
    for (int32_t i = 0; i < count; ++i) {
        out.top_ids[i] = scratch.ids[i];
        out.logprobs[1 + i] = row.x[scratch.ids[i]] - normaliser;
    }
}

void sample_row(const SampleTable& kernels, const float* logits, int32_t width, const AfdSampleRow& params,
                const RowResult& out, const float* after, int num_threads) {
    thread_local Scratch scratch;
    scratch.highest.resize((width + kGroup - 1) / kGroup);
    LogitRow row{kernels, logits, width, scratch.highest.data(), 0, after};
    const auto look = [&] {
        const bool has_nan = scan(kernels, row.x, width, scratch.highest.data(), num_threads);
        row.largest = *std::max_element(scratch.highest.begin(), scratch.highest.end());
        return !has_nan && std::isfinite(row.largest);
    };
    *out.token = -1;
    if (!look()) return;
    double normaliser = 0;
    if (params.num_logprobs >= 0) {
        normaliser = normaliser_of(row, num_threads);
        write_top(row, params.num_logprobs, normaliser, scratch.cut, out);
    }
    bool draws = params.scale > 0;
    if (adjusts(params)) {
        scratch.adjusted.assign(logits, logits + width);
        adjust(params, scratch.adjusted.data(), width, scratch);
        row.x = scratch.adjusted.data();
        draws &= look();
    }
    if (draws) {
        const Cut cut = find_cut(row, params.scale, params.top_k, params.top_p, params.least, scratch.cut, num_threads);
        *out.token = Race(row, params, cut).winner(scratch.cut);
    } else {
        *out.token = first_of(row, row.largest);
    }
    if (params.num_logprobs >= 0) out.logprobs[0] = logits[*out.token] - normaliser;
}

}  // namespace

int32_t check_tokens(const AfdSampleRow* rows, int32_t num_rows, int32_t width, int32_t* error_detail) {
    for (int32_t i = 0; i < num_rows; ++i) {
        const AfdSampleRow& row = rows[i];
        const struct {
            const int32_t* ids;
            int32_t num;
        } lists[] = {{row.bias_ids, row.num_biases},
                     {row.prompt, row.num_prompt},
                     {row.output, row.num_output},
                     {row.masked, row.num_masked}};
        for (const auto& list : lists)
            for (int32_t at = 0; at < list.num; ++at)
                if (list.ids[at] < 0 || list.ids[at] >= width) {
                    error_detail[0] = i;
                    error_detail[1] = list.ids[at];
                    return kNoSuchToken;
                }
    }
    return kOk;
}

void sample(const SampleTable& kernels, const float* logits, int64_t stride, int32_t width, const AfdSampleRow* rows,
            int32_t num_rows, const AfdSampled& out, int num_threads) {
    constexpr int64_t kElementsPerThread = 32 << 10;  // fewer are not worth waking one
    num_threads = static_cast<int>(std::clamp<int64_t>(int64_t{width} * num_rows / kElementsPerThread, 1, num_threads));
    const bool rows_in_turn = num_rows < num_threads;
    std::atomic<bool> out_of_memory{false};
    const auto run = [&](int row) {
        const RowResult result{out.tokens + row, out.logprobs + static_cast<int64_t>(row) * (1 + out.num_top),
                               out.top_ids + static_cast<int64_t>(row) * out.num_top};
        try {
            const int next = row + (rows_in_turn ? 1 : num_threads);  // threads take rows in their order
            const float* const after = next < num_rows ? logits + next * stride : nullptr;
            sample_row(kernels, logits + row * stride, width, rows[row], result, after, rows_in_turn ? num_threads : 1);
        } catch (const std::bad_alloc&) {
            out_of_memory.store(true, std::memory_order_relaxed);
        }
    };
    run_items(num_rows, rows_in_turn ? 1 : num_threads, run);
    if (out_of_memory) throw std::bad_alloc();
}

}  // namespace afd
