/* What every transfer does, without the interpreter: write a frame, read one, ring and read a bell, spin.

   Optional. Each function has a twin in Python (stepmesh/wire.py, stepmesh/transports/shm.py, stepmesh/polling.py) that is
   used where this is not built; tests hold the two against each other. What it does to memory is in frame.h. A frame that does not pass is not judged here:
   `read_frame` returns None, and the twin says what is wrong with it. Limited API: one file for every CPython from 3.11
   on. All calls hold the interpreter's lock, but for the waiting in `await_any`. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <poll.h>
#include <sched.h>

#include "lane.h"

_Static_assert(sizeof(SmHeader) == 96, "the packed header");

enum {
    NUM_FIELDS = 21,
    MAX_FDS = 4,
};

static PyObject *magic_bytes;
static PyTypeObject *board_type;

/* An integer of 0..limit; 0 with an exception set when it is none (so is a valid 0: ask PyErr_Occurred). */
static uint64_t take(PyObject *number, uint64_t limit)
{
    uint64_t value;
    if (PyLong_Check(number)) {
        value = PyLong_AsUnsignedLongLong(number);
    } else {
        PyObject *index = PyNumber_Index(number);
        if (index == NULL)
            return 0;
        value = PyLong_AsUnsignedLongLong(index);
        Py_DECREF(index);
    }
    if (value > limit) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_OverflowError, "%llu exceeds %llu", value, limit);
        return 0;
    }
    if (value == UINT64_MAX && PyErr_Occurred())
        return 0;
    return value;
}

/* write_frame(memory, kind, flags, ... the header's fields but magic, version and checksum): header and trailer. */
static PyObject *write_frame(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t num_args)
{
    if (num_args != 19) {
        PyErr_Format(PyExc_TypeError, "write_frame takes 19 arguments, not %zd", num_args);
        return NULL;
    }
    SmHeader header = {0};
    header.kind = take(args[1], UINT8_MAX);
    header.flags = take(args[2], UINT8_MAX);
    header.epoch = take(args[3], UINT32_MAX);
    header.generation = take(args[4], UINT32_MAX);
    header.seq = take(args[5], UINT64_MAX);
    header.step = take(args[6], UINT64_MAX);
    header.gang_id = take(args[7], UINT64_MAX);
    header.compute_ns = take(args[8], UINT64_MAX);
    header.member_mask_low = take(args[9], UINT64_MAX);
    header.member_mask_high = take(args[10], UINT64_MAX);
    header.num_tokens = take(args[11], UINT32_MAX);
    header.gang_tokens = take(args[12], UINT32_MAX);
    header.payload_bytes = take(args[13], UINT32_MAX);
    header.stream = take(args[14], UINT16_MAX);
    header.layer = take(args[15], UINT16_MAX);
    header.top_k = take(args[16], UINT16_MAX);
    header.wire_dtype = take(args[17], UINT8_MAX);
    header.checksum_kind = take(args[18], UINT8_MAX);
    if (PyErr_Occurred())
        return NULL;
    Py_buffer memory;
    if (PyObject_GetBuffer(args[0], &memory, PyBUF_WRITABLE) < 0)
        return NULL;
    int fits = sm_write_frame(memory.buf, memory.len, &header);
    PyBuffer_Release(&memory);
    if (!fits) {
        PyErr_Format(PyExc_OverflowError, "a payload of %u bytes exceeds the slot", header.payload_bytes);
        return NULL;
    }
    Py_RETURN_NONE;
}

static int take_numbers(PyObject *tuple, uint64_t *numbers, int count)
{
    for (int i = 0; i < count; i++) {
        PyObject *number = PyTuple_GetItem(tuple, i);
        if (number == NULL)
            return 0;
        numbers[i] = take(number, UINT64_MAX);
    }
    return !PyErr_Occurred();
}

/* An instance of a NamedTuple; steals the items. NULL with an exception when one of them is. */
static PyObject *named_tuple(PyObject *type, PyObject **items, Py_ssize_t count)
{
    PyObject *tuple = PyType_GenericAlloc((PyTypeObject *)type, count);
    int failed = tuple == NULL;
    for (Py_ssize_t i = 0; i < count; i++) {
        failed |= items[i] == NULL;
        if (tuple == NULL)
            Py_XDECREF(items[i]);
        else if (items[i] != NULL)
            PyTuple_SetItem(tuple, i, items[i]);
    }
    if (failed)
        Py_CLEAR(tuple);
    return tuple;
}

static PyObject *header_tuple(const SmHeader *header, PyObject *type)
{
    Py_INCREF(magic_bytes);
    PyObject *items[NUM_FIELDS] = {
        magic_bytes,
        PyLong_FromLong(header->version),
        PyLong_FromLong(header->kind),
        PyLong_FromLong(header->flags),
        PyLong_FromUnsignedLong(header->epoch),
        PyLong_FromUnsignedLong(header->generation),
        PyLong_FromUnsignedLongLong(header->seq),
        PyLong_FromUnsignedLongLong(header->step),
        PyLong_FromUnsignedLongLong(header->gang_id),
        PyLong_FromUnsignedLongLong(header->compute_ns),
        PyLong_FromUnsignedLongLong(header->member_mask_low),
        PyLong_FromUnsignedLongLong(header->member_mask_high),
        PyLong_FromUnsignedLong(header->num_tokens),
        PyLong_FromUnsignedLong(header->gang_tokens),
        PyLong_FromUnsignedLong(header->payload_bytes),
        PyLong_FromUnsignedLong(header->checksum),
        PyLong_FromLong(header->stream),
        PyLong_FromLong(header->layer),
        PyLong_FromLong(header->top_k),
        PyLong_FromLong(header->wire_dtype),
        PyLong_FromLong(header->checksum_kind),
    };
    return named_tuple(type, items, NUM_FIELDS);
}

/* read_frame(memory, rules, posted, header_type): the header, or None for a frame that the twin has to judge. */
static PyObject *read_frame(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t num_args)
{
    if (num_args != 4) {
        PyErr_Format(PyExc_TypeError, "read_frame takes 4 arguments, not %zd", num_args);
        return NULL;
    }
    SmRules rules;
    uint64_t posted[3];
    if (!take_numbers(args[1], (uint64_t *)&rules, sizeof rules / sizeof(uint64_t)) ||
        !take_numbers(args[2], posted, 3))
        return NULL;
    Py_buffer memory;
    if (PyObject_GetBuffer(args[0], &memory, PyBUF_SIMPLE) < 0)
        return NULL;
    SmHeader header;
    int good = sm_read_frame(memory.buf, memory.len, &rules, posted[0], posted[1], posted[2], &header);
    PyBuffer_Release(&memory);
    if (!good)
        Py_RETURN_NONE;
    return header_tuple(&header, args[3]);
}

/* may_follow(rule, frame, last, max_tokens, row_bytes): what answers, follows and begins (0, 1, 2) of lane.h say of two
   packed headers; for the test that holds them against their twins in stepmesh/wire.py. */
static PyObject *may_follow(PyObject *Py_UNUSED(module), PyObject *args)
{
    int rule;
    Py_buffer frame, last;
    unsigned long long max_tokens, row_bytes;
    if (!PyArg_ParseTuple(args, "iy*y*KK", &rule, &frame, &last, &max_tokens, &row_bytes))
        return NULL;
    SmHeader headers[2];
    int sizes_fit = frame.len == (Py_ssize_t)sizeof *headers && last.len == frame.len;
    if (sizes_fit) {
        memcpy(&headers[0], frame.buf, sizeof *headers);
        memcpy(&headers[1], last.buf, sizeof *headers);
    }
    PyBuffer_Release(&frame);
    PyBuffer_Release(&last);
    if (!sizes_fit || rule < 0 || rule > 2)
        return PyErr_Format(PyExc_ValueError, "no rule, or no packed headers");
    int passes = rule == 0   ? sm_answers(&headers[0], &headers[1])
                 : rule == 1 ? sm_follows(&headers[0], &headers[1])
                             : sm_begins(&headers[0], &headers[1], max_tokens, row_bytes);
    return PyBool_FromLong(passes);
}

/* Twin of stepmesh.transports.shm.Board. */
typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    SmBoard state;
    PyObject *posted_type;
} Board;

static PyObject *board_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *memory, *posted_type;
    unsigned long long num_slots;
    static char *names[] = {"memory", "num_slots", "posted_type", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OKO", names, &memory, &num_slots, &posted_type))
        return NULL;
    Board *board = (Board *)PyType_GenericAlloc(type, 0);
    if (board == NULL)
        return NULL;
    if (PyObject_GetBuffer(memory, &board->memory, PyBUF_WRITABLE) < 0) {
        Py_DECREF(board);
        return NULL;
    }
    if (num_slots == 0 || num_slots > (uint64_t)board->memory.len / (8 * SM_LINE_WORDS) - 1) {
        PyErr_Format(PyExc_ValueError, "%llu slots do not fit %zd bytes", num_slots, board->memory.len);
        Py_DECREF(board);
        return NULL;
    }
    board->state = (SmBoard){.words = board->memory.buf, .num_slots = num_slots};
    Py_INCREF(posted_type);
    board->posted_type = posted_type;
    return (PyObject *)board;
}

static void board_dealloc(Board *board)
{
    PyTypeObject *type = Py_TYPE((PyObject *)board);
    if (board->memory.obj != NULL)
        PyBuffer_Release(&board->memory);
    Py_XDECREF(board->posted_type);
    PyObject_Free(board);
    Py_DECREF(type);
}

/* post(slot, seq, bell_fd): errno of the bell, 0 when it rang. */
static PyObject *board_post(Board *board, PyObject *const *args, Py_ssize_t num_args)
{
    if (num_args != 3) {
        PyErr_Format(PyExc_TypeError, "post takes 3 arguments, not %zd", num_args);
        return NULL;
    }
    uint64_t slot = take(args[0], board->state.num_slots - 1), seq = take(args[1], UINT64_MAX);
    int fd = (int)take(args[2], INT32_MAX);
    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromLong(sm_post(&board->state, slot, seq, fd));
}

static PyObject *posted_tuple(const Board *board, uint64_t slot, uint64_t seq)
{
    PyObject *items[3] = {
        PyLong_FromUnsignedLongLong(slot / SM_NUM_PARITIES),
        PyLong_FromUnsignedLongLong(slot % SM_NUM_PARITIES),
        PyLong_FromUnsignedLongLong(seq),
    };
    return named_tuple(board->posted_type, items, 3);
}

/* poll(): () or a list of what was posted since the last call. Raises ValueError for what no honest peer writes. */
static PyObject *board_poll(Board *self, PyObject *Py_UNUSED(unused))
{
    SmBoard *board = &self->state;
    uint64_t posts = __atomic_load_n(board->words, __ATOMIC_ACQUIRE), seen = board->seen;
    if (posts == seen)
        return PyTuple_New(0);
    if (posts - seen > board->num_slots)
        return PyErr_Format(PyExc_ValueError, "bell of %llu posts, %llu were seen, %llu slots", posts, seen,
                            board->num_slots);
    PyObject *found = PyList_New(0);
    for (; found != NULL && seen != posts; seen++) {
        volatile uint64_t *place = sm_place(board, seen);
        uint64_t slot = place[0];
        PyObject *item = NULL;
        if (slot < board->num_slots)
            item = posted_tuple(self, slot, place[1]);
        else
            PyErr_Format(PyExc_ValueError, "post into slot %llu of %llu", slot, board->num_slots);
        if (item == NULL || PyList_Append(found, item) < 0)
            Py_CLEAR(found);
        Py_XDECREF(item);
    }
    board->seen = posts;
    return found;
}

/* address(): of the SmBoard, for native code that drives a lane. It goes with this object. */
static PyObject *board_address(Board *board, PyObject *Py_UNUSED(unused)) { return PyLong_FromVoidPtr(&board->state); }

/* Rings of the boards are looked at all the time, descriptors (a system call) and the clock once in a while. */
static int spin(Board *const *boards, Py_ssize_t num_boards, struct pollfd *fds, nfds_t num_fds, int64_t until_ns)
{
    for (;;) {
        for (int round = 0; round < SM_LOOKS_PER_YIELD; round++) {
            for (Py_ssize_t i = 0; i < num_boards; i++)
                if (sm_has_news(&boards[i]->state))
                    return 1;
            if (num_boards != 0)
                sm_pause();
        }
        if (num_fds != 0 && poll(fds, num_fds, 0) > 0)
            return 1;
        if (sm_now_ns() >= until_ns)
            return 0;
        sched_yield(); /* as the twin does */
    }
}

/* await_any(signs, seconds): whether a board (Board) or descriptor (int) of `signs` had news within that time. */
static PyObject *await_any(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t num_args)
{
    if (num_args != 2) {
        PyErr_Format(PyExc_TypeError, "await_any takes 2 arguments, not %zd", num_args);
        return NULL;
    }
    double seconds = PyFloat_AsDouble(args[1]);
    Py_ssize_t num_signs = PyTuple_Size(args[0]), num_boards = 0;
    if (num_signs < 0 || PyErr_Occurred())
        return NULL;
    struct pollfd fds[MAX_FDS];
    nfds_t num_fds = 0;
    Board **boards = PyMem_Malloc((num_signs ? num_signs : 1) * sizeof *boards);
    if (boards == NULL)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < num_signs; i++) {
        PyObject *sign = PyTuple_GetItem(args[0], i);
        if (PyObject_TypeCheck(sign, board_type))
            boards[num_boards++] = (Board *)sign;
        else if (num_fds < MAX_FDS)
            fds[num_fds++] = (struct pollfd){.fd = (int)take(sign, INT32_MAX), .events = POLLIN};
        else
            PyErr_Format(PyExc_ValueError, "more than %d descriptors", MAX_FDS);
    }
    int found = 0;
    if (!PyErr_Occurred()) {
        int64_t until_ns = sm_now_ns() + (int64_t)(seconds * 1e9);
        Py_BEGIN_ALLOW_THREADS;
        found = spin(boards, num_boards, fds, num_fds, until_ns);
        Py_END_ALLOW_THREADS;
    }
    PyMem_Free(boards);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(found);
}

static PyMethodDef board_methods[] = {
    {"post", (PyCFunction)(void (*)(void))board_post, METH_FASTCALL, "post(slot, seq, bell_fd) -> errno of the bell"},
    {"poll", (PyCFunction)board_poll, METH_NOARGS, "poll() -> what was posted since the last call"},
    {"address", (PyCFunction)board_address, METH_NOARGS, "address() -> of the SmBoard (frame.h)"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot board_slots[] = {
    {Py_tp_new, board_new},
    {Py_tp_dealloc, board_dealloc},
    {Py_tp_methods, board_methods},
    {0, NULL},
};

static PyType_Spec board_spec = {
    .name = "stepmesh._native.Board",
    .basicsize = sizeof(Board),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = board_slots,
};

static PyMethodDef functions[] = {
    {"write_frame", (PyCFunction)(void (*)(void))write_frame, METH_FASTCALL, "header and trailer of a frame"},
    {"read_frame", (PyCFunction)(void (*)(void))read_frame, METH_FASTCALL, "the header of a good frame, or None"},
    {"may_follow", may_follow, METH_VARARGS, "whether native code on a lane takes a frame"},
    {"await_any", (PyCFunction)(void (*)(void))await_any, METH_FASTCALL, "spin until there is news"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "stepmesh._native", .m_size = -1, .m_methods = functions};

PyMODINIT_FUNC PyInit__native(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    PyObject *type = PyType_FromSpec(&board_spec);
    magic_bytes = PyBytes_FromStringAndSize(SM_MAGIC, sizeof SM_MAGIC);
    if (type == NULL || magic_bytes == NULL || PyModule_AddObjectRef(module, "Board", type) < 0) {
        Py_XDECREF(type);
        Py_DECREF(module);
        return NULL;
    }
    board_type = (PyTypeObject *)type;
    return module;
}
