#include "sample_cut.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace afd {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls work(slice, groups) for parts of the groups, one at least; returns how many there were.
constexpr int kMaxSlices = 4 * kMaxThreads;
template <class Work>
int for_slices(int32_t num_groups, int num_threads, Work work) {
    constexpr int kGroupsPerThread = 256;  // less is not worth waking a thread
    const int threads = std::clamp(num_groups / kGroupsPerThread, 1, std::min(num_threads, kMaxThreads));
    const int slices = threads > 1 ? 4 * threads : 1;
    run_items(slices, threads, [&](int slice) {
        const auto begin = [&](int64_t index) { return static_cast<int32_t>(num_groups * index / slices); };
        work(slice, GroupRange{begin(slice), begin(slice + 1)});
    });
    return slices;
}

// Whole numbers in the order of the floats; of both zeros one.
uint32_t key_of(float x) {
    x += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

float of_key(uint32_t key) {
    const uint32_t bits = (key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// The first of the entries, in falling order, with which the masses reach `need`, which all of them together do. They come
// in the order of their ids and are used up.
Cut reach(Entry* entries, size_t count, int64_t need) {
    constexpr size_t kFew = 64;
    constexpr uint32_t kBuckets = 1024;
    while (count > kFew) {
        uint32_t first = entries->key, last = first;
        for (size_t i = 1; i < count; ++i) {
            first = std::min(first, entries[i].key);
            last = std::max(last, entries[i].key);
        }
        if (first == last) break;
        int shift = 0;
        while ((last - first) >> shift >= kBuckets) ++shift;
        int64_t masses[kBuckets] = {};
        for (size_t i = 0; i < count; ++i) masses[(entries[i].key - first) >> shift] += entries[i].mass;
        uint32_t bucket = (last - first) >> shift;
        for (; masses[bucket] < need; --bucket) need -= masses[bucket];
        size_t num_left = 0;
        for (size_t i = 0; i < count; ++i) {
            entries[num_left] = entries[i];
            num_left += (entries[i].key - first) >> shift == bucket;
        }
        count = num_left;
    }
    if (count <= kFew)
        std::sort(entries, entries + count,
                  [](const Entry& a, const Entry& b) { return a.key != b.key ? a.key > b.key : a.id < b.id; });
    for (; entries->mass < need; ++entries) need -= entries->mass;
    return {of_key(entries->key), entries->id};
}

// scratch.ids become the places of the elements in [low, high).
void find_between(const LogitRow& row, float low, float high, CutScratch& scratch) {
    scratch.ids.clear();
    for (int32_t group = 0; group < row.num_groups(); ++group) {
        if (!(row.highest[group] >= low)) continue;
        const int32_t end = std::min((group + 1) * kGroup, row.width);
        for (int32_t i = group * kGroup; i < end; ++i)
            if (row.x[i] >= low && row.x[i] < high) scratch.ids.push_back(i);
    }
}

// Entries for scratch.ids.
struct Weighed {
    Entry* entries;
    size_t count;
    int64_t mass;  // of all
    Cut reach(int64_t need) const { return afd::reach(entries, count, need); }
};

// Masses below `least` count as 0.
Weighed weigh_found(const LogitRow& row, float scale, int32_t least, CutScratch& scratch) {
    const size_t count = scratch.ids.size();
    float* const values = scratch.values.of(count);
    float* const weights = scratch.weights.of(count);
    Weighed weighed{scratch.entries.of(count), count, 0};
    for (size_t i = 0; i < count; ++i) values[i] = row.x[scratch.ids[i]];
    row.kernels.weigh(values, static_cast<int32_t>(count), row.largest, scale, weights);
    for (size_t i = 0; i < count; ++i) {
        const int32_t mass = mass_of(weights[i]), counted = mass >= least ? mass : 0;
        weighed.entries[i] = {key_of(values[i]), scratch.ids[i], counted};
        weighed.mass += counted;
    }
    return weighed;
}

int64_t needed(double top_p, int64_t total) {
    return static_cast<int64_t>(std::ceil(top_p * static_cast<double>(total)));
}

// Where the cut of top_p probably lies: between the elements at least `high` and those below `low`.
struct Guess {
    float low, high;
};

// From the largest element of each group, and a few of the others that stand for all of them.
Guess guess_cut(const LogitRow& row, float scale, double top_p, CutScratch& scratch) {
    constexpr int kBins = 512, kBinsPerPower = 16;
    constexpr int32_t kSamples = 4;        // of a group
    constexpr int32_t kFewGroups = 64;     // all of them are looked at
    constexpr float kStandFor = static_cast<float>(kGroup) / kSamples, kDeviations = 3;
    const int32_t num_groups = row.num_groups(), num_whole = row.width / kGroup, count = num_groups + kSamples * num_whole;
    float* const values = scratch.values.of(count);
    uint16_t* const bins = scratch.bins.of(count);
    float* const samples = std::copy_n(row.highest, num_groups, values);
    for (int32_t group = 0; group < num_whole; ++group)
        for (int32_t i = 0; i < kSamples; ++i) {
            const float x = row.x[group * kGroup + i];
            samples[group * kSamples + i] = x == row.highest[group] ? -kInfinity : x;
        }
    for (int32_t i = 0; i < count; ++i) {
        const float power = (row.largest - values[i]) * (scale * kBinsPerPower);
        bins[i] = static_cast<uint16_t>(static_cast<int>(power < kBins - 1 ? power : kBins - 1));
    }
    int32_t num_highest[kBins] = {}, num_others[kBins] = {};
    for (int32_t i = 0; i < num_groups; ++i) num_highest[bins[i]] += 1;
    for (int32_t i = num_groups; i < count; ++i) num_others[bins[i]] += 1;
    struct Sums {
        float mass = 0, squares = 0;  // squares: of what is a guess
    } sums[kBins];
    Sums sum;
    float weight = 0x1.f5257dp-1f;  // 2^(-1/32), in the middle of a bin
    for (int bin = 0; bin < kBins; ++bin, weight *= 0x1.ea4afap-1f) {
        const float guessed = num_others[bin] * kStandFor * weight;
        sum.mass += num_highest[bin] * weight + guessed;
        sum.squares += guessed * kStandFor * weight;
        sums[bin] = sum;
    }
    Guess guess{-kInfinity, kInfinity};
    int32_t num_above = 0;
    for (int bin = 0; bin < kBins - 1; ++bin) {
        num_above += num_highest[bin];
        const float part = sums[bin].mass / sum.mass, rest = 1 - part;
        const float variance = rest * rest * sums[bin].squares + part * part * (sum.squares - sums[bin].squares);
        const float deviation = kDeviations * std::sqrt(std::max(variance, 0.0f)) / sum.mass;
        const float edge = row.largest - (bin + 1) / (scale * kBinsPerPower);
        if (part + deviation < top_p && num_above > kFewGroups) guess.high = edge;
        if (part - deviation > top_p) {
            guess.low = edge;
            break;
        }
    }
    return guess;
}

Cut cut_by_mass(const LogitRow& row, float scale, double top_p, int32_t least, CutScratch& scratch, int num_threads) {
    const Guess guess = guess_cut(row, scale, top_p, scratch);
    int32_t* const found = scratch.found.of(static_cast<size_t>(row.num_groups()) * kGroup);
    const MassArgs args{row.x, row.highest, row.width, row.largest, scale, least, guess.low, guess.high, found,
                        row.after};
    const MassSums sums = sum_masses(row.kernels, args, num_threads);
    const int64_t need = needed(top_p, sums.total);
    if (need <= sums.above) {  // a wrong guess costs time
        find_between(row, guess.high, kInfinity, scratch);
        return weigh_found(row, scale, least, scratch).reach(need);
    }
    scratch.ids.assign(found, found + sums.num_found);
    const Weighed between = weigh_found(row, scale, least, scratch);
    if (need <= sums.above + between.mass) return between.reach(need - sums.above);
    find_between(row, -kInfinity, guess.low, scratch);
    return weigh_found(row, scale, least, scratch).reach(need - sums.above - between.mass);
}

// Of all tokens the `count` first; scratch.ids become theirs.
Cut cut_by_rank(const LogitRow& row, int32_t count, CutScratch& scratch) {
    find_first(row, count, scratch);
    Entry* const entries = scratch.entries.of(scratch.ids.size());
    for (size_t i = 0; i < scratch.ids.size(); ++i) entries[i] = {key_of(row.x[scratch.ids[i]]), scratch.ids[i], 1};
    const Cut cut = reach(entries, scratch.ids.size(), count);
    const auto is_out = [&](int32_t id) { return !cut.keeps(row.x[id], id); };
    scratch.ids.erase(std::remove_if(scratch.ids.begin(), scratch.ids.end(), is_out), scratch.ids.end());
    return cut;
}

}  // namespace

void find_first(const LogitRow& row, int32_t count, CutScratch& scratch) {
    const int32_t num_groups = row.num_groups();
    float bound = -kInfinity;  // as many groups have an element that is not less
    if (count <= num_groups) {
        float* const values = scratch.values.of(num_groups);
        std::copy_n(row.highest, num_groups, values);
        std::nth_element(values, values + (count - 1), values + num_groups, std::greater<float>());
        bound = values[count - 1];
    }
    find_between(row, bound, kInfinity, scratch);
}

Cut find_cut(const LogitRow& row, float scale, int32_t top_k, double top_p, int32_t least, CutScratch& scratch,
             int num_threads) {
    if (top_k == 0 || top_k >= row.width)
        return top_p < 1 ? cut_by_mass(row, scale, top_p, least, scratch, num_threads) : Cut{};
    const Cut cut = cut_by_rank(row, top_k, scratch);
    if (top_p >= 1) return cut;
    const Weighed kept = weigh_found(row, scale, least, scratch);
    return kept.reach(needed(top_p, kept.mass));
}

MassSums sum_masses(const SampleTable& kernels, const MassArgs& args, int num_threads) {
    MassSums parts[kMaxSlices];
    int32_t begins[kMaxSlices];
    const int slices = for_slices((args.width + kGroup - 1) / kGroup, num_threads, [&](int slice, GroupRange groups) {
        MassArgs part = args;
        begins[slice] = groups.begin * kGroup;
        if (part.found != nullptr) part.found += begins[slice];
        parts[slice] = kernels.sum_masses(part, groups);
    });
    MassSums sums{};
    for (int slice = 0; slice < slices; ++slice) {
        const MassSums& part = parts[slice];
        if (sums.num_found < begins[slice] && part.num_found > 0)
            std::memmove(args.found + sums.num_found, args.found + begins[slice], sizeof(int32_t) * part.num_found);
        sums.total += part.total;
        sums.above += part.above;
        sums.num_found += part.num_found;
    }
    return sums;
}

bool scan(const SampleTable& kernels, const float* x, int32_t width, float* highest, int num_threads) {
    std::atomic<bool> has_nan{false};
    for_slices((width + kGroup - 1) / kGroup, num_threads, [&](int, GroupRange groups) {
        if (kernels.scan(x, width, groups, highest)) has_nan.store(true, std::memory_order_relaxed);
    });
    return has_nan;
}

}  // namespace afd
