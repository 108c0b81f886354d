// Consecutive layers of one micro-batch whose exchanges native code makes by itself, over a lane of stepmesh: no Python
// between the last kernel of one side and the first one of the other. Each side stops where anything but the next layer's
// frame comes, or none does, and leaves the rest to its caller. Each throws std::bad_alloc.
#pragma once

#include "api.h"
#include "kernels.h"

namespace afd {

int32_t relay_attention(const KernelTable& kernels, const AfdAttentionRelay& relay, const AfdRelayBounds& bounds,
                        AfdRelayed* done, int num_threads, int32_t* error_detail);

int32_t relay_ffn(const KernelTable& kernels, const AfdFfnRelay& relay, const AfdRelayBounds& bounds, AfdRelayed* done,
                  int num_threads);

}  // namespace afd
