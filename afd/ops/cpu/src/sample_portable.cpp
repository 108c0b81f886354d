// Sampling with portable code.
#define AFD_ISA afd_sample_portable
#define AFD_LANES 4
#define AFD_BF16_DOT 0
#include "sample_rows.h"

namespace afd {
extern const SampleTable sample_portable = AFD_ISA::make_sample_table();
}
