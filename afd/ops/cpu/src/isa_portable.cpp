// SSE2 or NEON: what the compiler's baseline has.
#define AFD_ISA afd_portable
#define AFD_LANES 4
#define AFD_BF16_DOT 0
#include "isa_table.h"

namespace afd {
extern const KernelTable kernels_portable = AFD_ISA::make_table("portable");
}
