# To be sourced. read_recipe FILE: export its settings, one NAME=value a line, but for names that the environment has.
read_recipe() {
    local line name number=0
    while IFS= read -r line || [ -n "$line" ]; do       # the last line may lack its newline
        number=$((number + 1))
        [[ ! $line =~ ^[[:space:]]*(#|$) ]] || continue
        [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || {
            echo "error: $1, line $number: '$line': expected NAME=value from the first column on, or # and a comment" >&2
            exit 2
        }
        name=${line%%=*}
        [ -n "${!name+given}" ] || export "$line"
    done < "$1"
}
