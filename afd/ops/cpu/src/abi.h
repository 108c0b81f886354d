// How a C interface is told as text: what `abi.cpp` says of this library's own, and whoever adds one says of that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace afd {

template <class T>
std::string code() {
    if constexpr (std::is_array_v<T>)
        return code<std::remove_extent_t<T>>() + "*" + std::to_string(std::extent_v<T>);
    else if constexpr (std::is_pointer_v<T>)
        return "ptr";
    else if constexpr (std::is_void_v<T>)
        return "void";
    else if constexpr (std::is_class_v<T>)
        return "struct" + std::to_string(sizeof(T));
    else {
        static_assert(std::is_arithmetic_v<T>);
        const char* const kind = std::is_floating_point_v<T> ? "f" : std::is_signed_v<T> ? "i" : "u";
        return kind + std::to_string(8 * sizeof(T));
    }
}

template <class Result, class... Arguments>
std::string signature(Result (*)(Arguments...)) {
    std::string text = code<Result>() + "(";
    ((text += code<Arguments>() + ","), ...);
    return text + ")";
}

struct Text {
    std::string lines;
    void add(const std::string& name, const std::string& value) { lines += name + "=" + value + "\n"; }
};

}  // namespace afd

#define FUNCTION(name) text.add(#name, signature(name))
#define CONSTANT(name) text.add(#name, std::to_string(static_cast<int64_t>(name)))
// A structure's size, and of each of its fields the place and the type.
#define STRUCT(type, fields)               \
    do {                                   \
        using T = type;                    \
        const std::string of = #type;      \
        text.add(of, code<T>());           \
        fields                             \
    } while (false)
#define F(name) text.add(of + "." #name, code<decltype(T::name)>() + "@" + std::to_string(offsetof(T, name)));
